"""The managed form: requests are announced one by one, and the service itself keeps what they are load of."""
