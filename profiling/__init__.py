"""Measuring: who this device is, how to time on it, what bounds a kernel, and the report that shows it."""
