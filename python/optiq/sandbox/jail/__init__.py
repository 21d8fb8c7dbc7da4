"""What runs inside a jail, or on the way into it. Standard library only: a jail sees no more.

The host starts `zygote.py` (Linux) or `alone.py` (macOS) with this folder's parent as the one entry
of `sys.path` beside the standard library, so nothing here may import from `optiq`.
"""
