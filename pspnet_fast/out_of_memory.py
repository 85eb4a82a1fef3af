"""What an error of the memory looks like, whoever raises it."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was wanting, of Python, torch (CPU or GPU), the kernels or OpenCV."""
    texts = ("can't allocate memory", "out of memory", "Insufficient memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
