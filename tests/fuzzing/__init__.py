"""Broken and hostile files, made by mutation: whatever is read ends well or in one line.

python -m fuzzing.run jsonl --seconds 600        from the folder tests/; `make fuzz` runs all targets
"""
