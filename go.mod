module reverse_exporter

go 1.26
