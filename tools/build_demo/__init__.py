"""Build the bundled base model and the demo's rows."""
