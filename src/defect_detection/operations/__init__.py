"""What a team runs beside the pipeline: a tracking server with its database, backups."""
