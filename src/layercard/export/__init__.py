"""A placement in the words of other trainers: the keys that each of them reads, and no others."""
