"""One file per row layout; each turns a row into the canonical fields that tasks understand."""
