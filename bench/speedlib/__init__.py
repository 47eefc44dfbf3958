"""The parts of bench/speed.py: what is measured, on which networks, behind which gate, and how it is written down."""
