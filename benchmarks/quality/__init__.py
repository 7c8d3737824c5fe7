"""Quality of a teacher and its student against network calls and against time."""
