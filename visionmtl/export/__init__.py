"""Trained networks as files of other runtimes, with what those must know; parity with eager; INT8; the hub."""
