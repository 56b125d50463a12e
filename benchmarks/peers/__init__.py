"""The peers of the benchmarks: the same jobs, as a careful user of the other library would write them.

One peer a file. Each needs its own library, so import the one wanted (`from peers import trace_enum`); importing this
package imports none of them. Nothing here imports pyrovae.
"""
