def forecast(task):
    return {"phases": {}}


def words(told):
    return ""
