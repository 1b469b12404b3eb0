"""One file, one backend; ``<backend>_*`` files hold its kernels. See ``scan_kernels/op.py`` for the contract."""
