"""Tables, pictures and the report of a study."""
