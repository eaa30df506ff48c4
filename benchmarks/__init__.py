"""Measurements of speed and accuracy, with the machine and the versions they were taken on."""
