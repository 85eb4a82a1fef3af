"""One HTML page of one or several training runs: what :func:`pspnet_fast.report.page.write_page` makes."""
