"""The user interface: flags, files, errors, formatted numbers and tables, progress."""
