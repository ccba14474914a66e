"""Commands that write files of the repository."""
