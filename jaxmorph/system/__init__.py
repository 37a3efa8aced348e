"""The host of a run: signals, memory, processes, files, and the crash points of the tests."""
