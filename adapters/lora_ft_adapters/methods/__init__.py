"""One file per method that is ours, or that is PEFT's with other defaults. Each registers itself."""
