"""What runs with a known gold score say about over-optimization: curves, matched KL, intervals, tables.

It reads the files of finished runs and needs nothing that trained them.
"""
