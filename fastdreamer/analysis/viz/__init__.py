"""Figures and videos, made from files and frames only; nothing here opens a window."""
