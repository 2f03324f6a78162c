"""Long-running searches for inputs that break a promise; short forms of them are tests of the
suite.
"""
