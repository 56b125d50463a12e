"""Pyro programs recorded once as a flat graph of tensor operations, and replayed at the speed of a compiled loop."""
