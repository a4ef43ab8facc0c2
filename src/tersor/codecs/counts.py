"""The counts of a frequency table: what they add up to, and the logarithms that stand for them in the file."""

BITS = 14  # the counts of a table add up to two to this
TOTAL = 1 << BITS
STEPS = 8  # per octave of a stored logarithm
LARGEST = STEPS * BITS + 1
