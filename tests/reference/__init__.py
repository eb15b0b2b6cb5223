"""A literal, slow FlyLoRA that shares no code with the library, to judge it by."""
