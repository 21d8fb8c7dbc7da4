"""Coding agents on our server: configure.py says how each is set up, start.py starts one."""
