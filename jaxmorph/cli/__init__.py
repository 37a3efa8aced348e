"""What a person meets: flags, YAML and JSON files, errors, numbers and tables in words, progress."""
