"""What may be released: registered versions, decisions and the record of them, comparison, and the registered model itself.

May import `tracking`, `report` and `workspace`.
"""
