"""What a run's JSON is shown as: text for the terminal, tables in README.md, a page of HTML."""
