"""The images that models learn from and are tested on."""
