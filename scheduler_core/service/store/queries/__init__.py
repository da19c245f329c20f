"""What is asked of the database, one function a question, in the transaction that it is given."""
