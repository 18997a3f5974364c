"""The programs that run in the lab's hosts. Each is a file of its own that needs only the standard library,
so that it starts at once, and has a process, a name and a user that the tools can find.

They take a configuration (JSON) as argument, commands (JSON lines) on standard input, and report (JSON
lines) on standard output. `tcpscope.lab.programs` is the other end. The end of their input ends them.
"""
