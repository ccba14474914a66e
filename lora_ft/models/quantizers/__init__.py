"""One file per way to store the frozen base in fewer bits."""
