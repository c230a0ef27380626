"""The REST resources, one file each. A route parses, delegates and returns; no rule of the domain lives here."""
