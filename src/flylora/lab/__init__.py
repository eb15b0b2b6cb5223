"""The laboratory: what measures. It imports the library and is never imported by it."""
