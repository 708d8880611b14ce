"""Break training runs in every way that machines do, continue them, and compare their ends with an undisturbed one."""
