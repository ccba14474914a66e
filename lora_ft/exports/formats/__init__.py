"""One file per form in which an adapter leaves the project."""
