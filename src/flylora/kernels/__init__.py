"""The routed update, faster, on the devices that have a kernel for it."""
