"""From files to rows of verdicts, with the model in production."""
