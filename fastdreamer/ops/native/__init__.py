"""Native bodies of the ops: thin faces of the C++ core, under the same file names as the ops."""
