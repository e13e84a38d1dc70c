"""How the JSON of a run is shown: text, tables and a picture for the documents, a page of HTML."""
