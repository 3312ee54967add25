"""What the runtime asks of a device, a GPU that does it, and one made of threads or of arithmetic for tests."""
