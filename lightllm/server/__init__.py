"""The top floor: from a command line to running processes. Imports everything below, lazily."""
