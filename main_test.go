package main

import (
	"bytes"
	"os"
	"testing"
)

func BenchmarkParse(b *testing.B) {
	data, _ := os.ReadFile("/tmp/w/data/10m.prom")
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	p := &parser{}
	for b.Loop() {
		*p = parser{src: bytes.NewReader(data), buf: p.buf[:0], labels: p.labels[:0]}
		n := 0
		for p.next() {
			n++
		}
		if p.err != nil {
			b.Fatal(p.err)
		}
	}
}
func BenchmarkLines(b *testing.B) {
	data, _ := os.ReadFile("/tmp/w/data/10m.prom")
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		for d := data; len(d) > 0; {
			i := bytes.IndexByte(d, '\n')
			d = d[i+1:]
		}
	}
}

func BenchmarkScrape(b *testing.B) {
	data, _ := os.ReadFile("/tmp/w/data/10m.prom")
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	var a addedLabels
	a.add("exporter_name", "gen")
	a.telling = true
	buf := make([]byte, 0, 2*len(data))
	for b.Loop() {
		if _, err := read(bytes.NewReader(data), &a, buf, 1<<30); err != nil {
			b.Fatal(err)
		}
	}
}
func BenchmarkMerge(b *testing.B) {
	data, _ := os.ReadFile("/tmp/w/data/10m.prom")
	b.ReportAllocs()
	var a1, a2 addedLabels
	a1.telling, a2.telling = true, true
	a1.add("exporter_name", "gen")
	a2.add("exporter_name", "gen2")
	e1, _ := read(bytes.NewReader(data), &a1, nil, 1<<30)
	e2, _ := read(bytes.NewReader(data), &a2, nil, 1<<30)
	b.SetBytes(int64(len(e1.buf) + len(e2.buf)))
	for b.Loop() {
		merge([]*exposition{e1, e2})
	}
}
