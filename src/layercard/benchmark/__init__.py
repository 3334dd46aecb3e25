"""The placement benchmark: many placements trained under equal conditions, one immutable JSON a run, tables from the JSON."""
