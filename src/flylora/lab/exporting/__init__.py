"""`flylora export`: texts from tasks and files, and tasks to evaluate on, around the library's own export."""
