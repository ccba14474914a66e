"""Find, convert and load base models."""
