//go:build linux

// Attack pulls at reverse_exporter. It starts the program in one hard situation after another,
// with an honest scraper that asks every 2 s beside those who attack, and tells in a table
// what became of the honest one and of the memory.
//
//	go run ./testdata/attack                  all scenarios, in ten minutes
//	go run ./testdata/attack -run 2,5b        some of them
//	go run ./testdata/attack -run integrity -for 1h
//	                                          only whether samples are whole and new, see integrity.go
//	go run ./testdata/attack -addresses 1000  the attackers have that many client addresses
//	go run ./testdata/attack -binary PATH     a program that is built already
//
// Everything stays on loopback and in a temporary folder. A scenario takes half a minute and
// a few thousand connections. Scenarios have the numbers of the lists that they come from. Of the
// list with letters these have no scenario, for a script or a test shows them each time:
//
//	H2  a source's own reverse_exporter_ metrics: script own-metrics
//	H7  the exit status of wrong flags: scripts flags-*
//	M1  wrong passwords of many addresses: scenario 4b, TestTurn
//	M2  connections after a change of the CA: TestWhoMayAsk
//	M6  an exporter whose address changes, and
//	M7  one that serves a connection at a time: TestReconnect
//	M8  two logins of a source: script flags-options
//	M10 what a failed run told: TestStandIn; what is left to scrapes that have gone: waterfall.txt
package main

import (
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ---- Scenarios

// scenario is one hard situation.
type scenario struct {
	id, name  string
	attackers int
	addresses int     // that the attackers share
	rate      float64 // attacks a second of all attackers together, after the first of each
	memory    int     // most that the program may take, in MB

	flags  func(a *arena) []string                        // of the program; prepares its sources
	attack func(ctx context.Context, a *arena, c *client) // is what an attacker does again and again
	before func(a *arena, n int)                          // is called before the honest scrape n
	check  func(a *arena, n int, page string) error       // finds what is wrong with the page of scrape n
	after  func(a *arena) error                           // finds what is wrong at the end

	// honest is done instead of the honest scrapes. A scenario that has it is run only if it is named.
	honest func(ctx context.Context, a *arena) (outcome, []error)
}

// The honest scraper makes so many scrapes, one at each interval, and waits so long for each.
const scrapes, interval, timeout = 10, 2 * time.Second, 10 * time.Second

var scenarios = []scenario{
	{id: "1", name: "fetches that cannot be ended", memory: 256,
		flags: hangingDisk, before: hangAndRecover, check: tellsHanging},
	{id: "2", name: "invented values for a command", attackers: 40, addresses: 20, rate: 100, memory: 256,
		flags:  slowScript,
		attack: func(ctx context.Context, a *arena, c *client) { c.askOrLeave(ctx, "/metrics?x="+invented()) }},
	{id: "3", name: "invented values for a large exporter", attackers: 150, addresses: 20, rate: 10, memory: 512,
		flags:  largeExporter,
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/metrics?x="+invented(), nil) }},
	{id: "4", name: "wrong passwords", attackers: 1000, addresses: 20, rate: 150, memory: 256,
		flags:  behindPassword,
		before: func(a *arena, n int) { a.rotate() },
		attack: func(ctx context.Context, a *arena, c *client) {
			c.ask(ctx, "/metrics", func(r *http.Request) { r.SetBasicAuth("prometheus", invented()) })
		}},
	{id: "4b", name: "wrong passwords of many addresses", attackers: 1000, addresses: 200, rate: 60, memory: 256,
		flags: behindPassword,
		attack: func(ctx context.Context, a *arena, c *client) {
			c.ask(ctx, "/metrics", func(r *http.Request) { r.SetBasicAuth("prometheus", invented()) })
		}},
	{id: "5", name: "random subsets of sources", attackers: 1000, addresses: 20, rate: 100, memory: 256,
		flags:  func(a *arena) []string { return tenSources(a, 300<<10) },
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/metrics?"+subset(), zipped) }},
	{id: "5b", name: "two large raw bodies elsewhere", attackers: 2, addresses: 2, rate: 2, memory: 256,
		flags:  func(a *arena) []string { return twoLarge(a, "gauge", "gauge", "--raw", "one,other") },
		attack: askLarge},
	{id: "5c", name: "slow readers of a large page", attackers: 12, addresses: 12, rate: 2, memory: 512,
		flags: func(a *arena) []string { return twoLarge(a, "gauge", "gauge") },
		attack: func(ctx context.Context, a *arena, c *client) {
			sleep(ctx, time.Duration(c.number)*time.Second) // so that each gets a page of its own
			c.readSlowly(ctx, "/large")
		}},
	{id: "6", name: "a log that nobody reads", attackers: 20, addresses: 20, rate: 200, memory: 256,
		flags:  unreadLog,
		before: closeLog,
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/metrics?x="+invented(), nil) }},
	{id: "7", name: "clients waiting at a slow source", attackers: 1500, addresses: 20, rate: 150, memory: 256,
		flags:  slowSource,
		attack: func(ctx context.Context, a *arena, c *client) { c.hold(ctx, "/slow") }},
	{id: "7b", name: "clients without credentials", attackers: 1500, addresses: 20, rate: 150, memory: 256,
		flags:  func(a *arena) []string { return append(slowSource(a), behindPassword(a)[2:]...) },
		attack: func(ctx context.Context, a *arena, c *client) { c.hold(ctx, "/metrics") }},
	{id: "8", name: "a command that leaves its process group", memory: 256,
		flags: joiningCommand, check: isDown("joiner"), after: noneLeft},
	{id: "9", name: "commands that end before their output", memory: 256,
		flags: tornOutput, check: nothingTorn},
	{id: "10", name: "a gzip bomb", attackers: 2, addresses: 2, rate: 2, memory: 512,
		flags: gzipBomb, attack: askLarge},
	{id: "10b", name: "two large bodies in conflict", attackers: 2, addresses: 2, rate: 2, memory: 512,
		flags:  func(a *arena) []string { return twoLarge(a, "gauge", "counter") },
		attack: askLarge},
	{id: "10c", name: "a large body of quoted names", attackers: 2, addresses: 2, rate: 2, memory: 512,
		flags: quotedNames, attack: askLarge},
	{id: "13", name: "a glob of 100,000 files", memory: 512,
		flags: manyFiles, check: endsInTime},
	{id: "H1", name: "deadlines too short for an exporter", attackers: 20, addresses: 20, rate: 50, memory: 256,
		flags:  tooHurried,
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/metrics", within("0.3")) }},
	{id: "H3", name: "a glob that matches without end", memory: 416,
		flags: endlessGlob, check: isDown("evil")},
	{id: "H4", name: "the overview of 300,000 conflicts", attackers: 300, addresses: 20, rate: 200, memory: 576,
		flags: func(a *arena) []string { return conflicts(a, 300_000) },
		before: func(a *arena, n int) {
			if n == 0 {
				newClient(a, 1).ask(a.ctx, "/large", nil)
			}
		},
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/", nil) }},
	{id: "H5", name: "readers of nothing beside one of 1.5 MB/s", attackers: 200, addresses: 10, rate: 20, memory: 256,
		flags: func(a *arena) []string {
			a.pace = 1_500_000
			return tenSources(a, 200<<10)
		},
		attack: func(ctx context.Context, a *arena, c *client) { c.stare(ctx, "/metrics?"+subset()) }},
	{id: "H6", name: "a file of users that could not be read", memory: 256,
		flags: revoking, before: revoke, check: isRevoked},
	{id: "H8", name: "pages of 60,000 conflicts elsewhere", attackers: 60, addresses: 30, rate: 60, memory: 416,
		flags: func(a *arena) []string { return conflicts(a, 60_000) },
		attack: func(ctx context.Context, a *arena, c *client) {
			c.ask(ctx, "/large", func(r *http.Request) { r.Method = []string{"GET", "HEAD"}[rand.IntN(2)] })
		}},
	{id: "M3", name: "deadlines too short for anything", attackers: 20, addresses: 20, rate: 300, memory: 256,
		flags: countedRuns, check: runsAreTold,
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/metrics", within("0.003")) }},
	{id: "M4", name: "as many addresses, a request of each", attackers: 1500, addresses: 1500, rate: 150, memory: 256,
		flags:  slowSource,
		attack: func(ctx context.Context, a *arena, c *client) { c.hold(ctx, "/slow") }},
	{id: "M4t", name: "the same with TLS", attackers: 1500, addresses: 1500, rate: 50, memory: 256,
		flags: func(a *arena) []string { return append(slowSource(a), withTLS(a)...) },
		attack: func(ctx context.Context, a *arena, c *client) {
			sleep(ctx, rand.N(5*time.Second)) // or the handshakes of this program are what takes long
			c.hold(ctx, "/slow")
		}},
	{id: "M5", name: "30 commands on a busy machine", attackers: 3, addresses: 3, rate: 1000, memory: 256,
		flags: manyCommands, check: allAreUp,
		attack: func(ctx context.Context, a *arena, c *client) {
			for begun := time.Now(); time.Since(begun) < 50*time.Millisecond; {
			}
		}},
	{id: "M9", name: "a source that changes with each fetch", attackers: 20, addresses: 20, rate: 300, memory: 64,
		flags: flippingExporter, after: logIsShort,
		attack: func(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/metrics", nil) }},
	{id: "M11", name: "a token on a disk that hangs", memory: 256,
		flags: hangingToken, before: hangChanged, after: endsThough},
	{id: "integrity", name: "all that changes, and mixed traffic", attackers: 12, addresses: 12, rate: 8, memory: 256,
		flags: generations, attack: mixed, honest: readAll},
}

// good are the flags of a source that is well.
func good(a *arena) []string { return []string{"--file", "good=" + a.file("good.prom", "good 1\n")} }

// hangingDisk has sources on a disk that will hang, asked by themselves and by scrapes.
func hangingDisk(a *arena) []string {
	folder := a.mount()
	hung := filepath.Join(folder, "hung.prom")
	return append(good(a), "--timeout", "2s", "--timeout", "good:10s",
		"--file", "repeated="+hung, "--interval", "repeated:1s",
		"--file", "asked="+hung,
		"--exec", "command=cat '"+hung+"'", "--interval", "command:1s",
		"--file", "glob="+filepath.Join(folder, "*.prom"))
}

// hangAndRecover has the disk hang from the second scrape to the ninth.
func hangAndRecover(a *arena, n int) { a.disk.hang(n >= 1 && n < 8) }

// tellsHanging checks that sources on the disk are down while it hangs, and up afterwards.
func tellsHanging(a *arena, n int, page string) error {
	for _, name := range []string{"repeated", "asked", "command", "glob"} {
		switch up := isUp(page, name); {
		case n == 3 && up: // a later one may wait until the disk is well
			return fmt.Errorf("%s is up though its disk hangs", name)
		case n == 3 && !strings.Contains(page, `failures_total{exporter_name="`+name+`",reason="timeout"} `):
			return fmt.Errorf("%s has no timeout counted", name)
		case (n == 0 || n == 9) && !up:
			return fmt.Errorf("%s is down though its disk is well", name)
		}
	}
	meets := n == 1 || n == 2 // the fetch that meets it has no other, and the next scrape may share it
	if !meets && !strings.Contains(page, `well{exporter_name="glob"} 1`) {
		return fmt.Errorf("scrape %d: a hung file costs its glob the other one", n)
	}
	return nil
}

// slowScript is a command that takes a value from its scrapers.
func slowScript(a *arena) []string {
	return []string{"--exec", `good=sh -c "sleep 0.7; echo good 1" sh {x=default}`}
}

// largeExporter is an exporter of 10 MB that takes values from its scrapers.
func largeExporter(a *arena) []string {
	text := body("m%d", "gauge", 10<<20)
	url := a.serve(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, text) })
	return []string{"--http", "good=" + url, "--params", "good:*"}
}

// behindPassword demands a password. The first two flags are a good source.
func behindPassword(a *arena) []string {
	a.rotate()
	return append(good(a), "--web.basic-auth-file", filepath.Join(a.dir, "users"))
}

// tenSources are ten files of so many bytes.
func tenSources(a *arena, size int) []string {
	flags := good(a)
	for i := range 10 {
		name := fmt.Sprintf("s%d", i)
		flags = append(flags, "--file", name+"="+a.file(name, body(name+"_m%d", "gauge", size)))
	}
	return flags
}

// twoLarge are two bodies of 31 MB at /large, whose families have the same names.
func twoLarge(a *arena, oneType, otherType string, more ...string) []string {
	one, other := body("m%d", oneType, 31<<20), body("m%d", otherType, 31<<20)
	other = strings.ReplaceAll(other, `{i="`, `{j="`)
	return append(append(good(a), more...), "--path", "one:/large", "--path", "other:/large",
		"--file", "one="+a.file("one", one), "--file", "other="+a.file("other", other))
}

// gzipBomb is an exporter of 4 GB that come compressed to 4 MB.
func gzipBomb(a *arena) []string {
	line := []byte(strings.Repeat("a 1\n", 1<<14))
	url := a.serve(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		for i, err := 0, error(nil); i < 4<<30/len(line) && err == nil; i++ {
			_, err = z.Write(line)
		}
		z.Close()
	})
	return append(good(a), "--http", "bomb="+url, "--path", "bomb:/large")
}

// quotedNames is a body of 31 MB whose names need quotes.
func quotedNames(a *arena) []string {
	text := body(`m.%d`, "gauge", 25<<20)
	text = regexp.MustCompile(`(?m)^(m\.\d+)\{`).ReplaceAllString(text, `{"$1",`)
	text = regexp.MustCompile(`(?m)^(# \w+) (m\.\d+) `).ReplaceAllString(text, `$1 "$2" `)
	return append(good(a), "--file", "quoted="+a.file("quoted", text), "--path", "quoted:/large")
}

// askLarge asks for what is at /large, as Prometheus does.
func askLarge(ctx context.Context, a *arena, c *client) { c.ask(ctx, "/large", zipped) }

// unreadLog is a failing command that takes values, and a log whose reader does not read.
func unreadLog(a *arena) []string {
	a.logReader, a.log, _ = os.Pipe()
	return append(good(a), "--log.level", "debug", "--parallel", "failing:4",
		"--exec", `failing=sh -c "echo a long complaint >&2; exit 1" sh {x=default}`)
}

// closeLog has the reader of the log leave in the middle.
func closeLog(a *arena, n int) {
	if n == scrapes/2 {
		a.logReader.Close()
	}
}

// slowSource is a source at /slow that takes long, and a good one that takes a second.
func slowSource(a *arena) []string {
	return []string{"--exec", "good=sh -c 'sleep 1; echo good 1'",
		"--exec", "slow=sh -c 'sleep 25; echo slow 1'", "--timeout", "slow:30s", "--path", "slow:/slow"}
}

// joiningCommand is a command that hides in another process group, and does not end.
func joiningCommand(a *arena) []string {
	return append(good(a), "--timeout", "joiner:1s",
		"--exec", fmt.Sprintf("joiner='%s' -helper join '%s'", a.self, filepath.Join(a.dir, "pids")))
}

// noneLeft checks that no process of joiningCommand is left.
func noneLeft(a *arena) error {
	time.Sleep(2 * time.Second)
	pids, err := os.ReadFile(filepath.Join(a.dir, "pids"))
	for _, pid := range strings.Fields(string(pids)) {
		if n, _ := strconv.Atoi(pid); syscall.Kill(n, 0) == nil {
			syscall.Kill(n, syscall.SIGKILL)
			err = errors.New("a command was not killed")
		}
	}
	return err
}

// tornOutput are commands whose child is still to write the second half of a line.
func tornOutput(a *arena) []string {
	return append(good(a), "--exec", `child=sh -c 'printf "balance 1"; (sleep 1; echo 2345) &'`,
		"--exec", fmt.Sprintf("session='%s' -helper leave", a.self))
}

var torn = regexp.MustCompile(`(?m)^balance\{.*\} 1$`)

// nothingTorn checks that no first half of a line is served.
func nothingTorn(a *arena, n int, page string) error {
	if torn.MatchString(page) {
		return errors.New("half of a line is served")
	}
	return errors.Join(isDown("child")(a, n, page), isDown("session")(a, n, page))
}

// isDown returns a check that a source is down.
func isDown(name string) func(a *arena, n int, page string) error {
	return func(a *arena, n int, page string) error {
		if isUp(page, name) {
			return fmt.Errorf("%s is up", name)
		}
		return nil
	}
}

// manyFiles is a glob of very many files.
func manyFiles(a *arena) []string {
	os.Mkdir(filepath.Join(a.dir, "many"), 0o700)
	for i := range 100_000 {
		a.file(fmt.Sprintf("many/%d.prom", i), fmt.Sprintf("many{i=\"%d\"} 1\n", i))
	}
	return append(good(a), "--file", "many="+filepath.Join(a.dir, "many/*.prom"), "--timeout", "many:5s")
}

var durationOfMany = regexp.MustCompile(`source_scrape_duration_seconds\{exporter_name="many"\} (\S+)`)

// endsInTime checks that the fetch of many files ends at its timeout, if not before.
func endsInTime(a *arena, n int, page string) error {
	if found := durationOfMany.FindStringSubmatch(page); found != nil {
		if seconds, _ := strconv.ParseFloat(found[1], 64); seconds > 6 {
			return fmt.Errorf("a fetch with a timeout of 5 s took %.1f s", seconds)
		}
	}
	return nil
}

// within returns a change of a request: it announces a deadline.
func within(seconds string) func(r *http.Request) {
	return func(r *http.Request) { r.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", seconds) }
}

// tooHurried is an exporter that probes something for half a second, and fails if it is told to have
// less than one.
func tooHurried(a *arena) []string {
	return []string{"--http", "good=" + a.serve(func(w http.ResponseWriter, r *http.Request) {
		seconds, _ := strconv.ParseFloat(r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64)
		if sleep(r.Context(), time.Duration(min(seconds, 0.5)*float64(time.Second))); seconds < 1 {
			http.Error(w, "it took too long", http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "good 1\n")
	})}
}

// endlessGlob is a folder that holds itself 5,000 times, and a pattern of its files' files.
func endlessGlob(a *arena) []string {
	folder := filepath.Join(a.dir, "folder")
	os.Mkdir(folder, 0o700)
	for i := range 5000 {
		os.Symlink(".", filepath.Join(folder, fmt.Sprintf("x%d.prom", i)))
	}
	return append(good(a), "--timeout", "evil:3s", "--file", "evil="+folder+"/*/*.prom")
}

// conflicts are two bodies at /large with so many families of one sample, of which none agrees with the other's.
func conflicts(a *arena, n int) []string {
	flags := append(good(a), "--path", "gauge:/large", "--path", "counter:/large")
	for _, sampleType := range []string{"gauge", "counter"} {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "# TYPE f%d %s\nf%d 1\n", i, sampleType, i)
		}
		flags = append(flags, "--file", sampleType+"="+a.file(sampleType, b.String()))
	}
	return flags
}

// revoking is a program of a user who is not root, and the users whom it knows.
func revoking(a *arena) []string {
	os.Chmod(filepath.Dir(a.dir), 0o755)
	os.Chmod(a.dir, 0o755)
	a.ordinary = true
	flags := behindPassword(a)
	name := filepath.Join(a.dir, "users")
	text, _ := os.ReadFile(name)
	a.file("users", string(text)+strings.Replace(string(text), "prometheus:", "revoked:", 1))
	os.Chmod(name, 0o644)
	os.Chmod(filepath.Join(a.dir, "good.prom"), 0o644)
	return flags
}

// revoke removes a user, but by a file that cannot be read at first.
func revoke(a *arena, n int) {
	name := filepath.Join(a.dir, "users")
	switch n {
	case 1:
		text, _ := os.ReadFile(name)
		first, _, _ := strings.Cut(string(text), "\n")
		os.Chmod(a.file("users.new", first+"\n"), 0)
		os.Rename(name+".new", name)
		a.program.Process.Signal(syscall.SIGHUP)
	case 4:
		os.Chmod(name, 0o644)
	}
}

// isRevoked checks that the user is known as long as the file cannot be read, and 6 s after that no more.
func isRevoked(a *arena, n int, page string) error {
	revoked := func(r *http.Request) { r.SetBasicAuth("revoked", password) }
	code, want := newClient(a, 1).ask(a.ctx, "/-/none", revoked), 0
	switch {
	case n < 4:
		want = http.StatusNotFound
	case n >= 7:
		want = http.StatusUnauthorized
	}
	if want > 0 && code != want {
		return fmt.Errorf("a revoked user gets %d, want %d", code, want)
	}
	return nil
}

// countedRuns is a command that counts how often it is run.
func countedRuns(a *arena) []string {
	return []string{"--exec", fmt.Sprintf(`good=sh -c "echo >>'%s'; echo good 1"`, filepath.Join(a.dir, "runs"))}
}

var fetchesOfGood = regexp.MustCompile(`source_fetches_total\{exporter_name="good"\} (\d+)`)

// runsAreTold checks that only the scrapes have run the command, and that the page tells of each run.
func runsAreTold(a *arena, n int, page string) error {
	runs, _ := os.ReadFile(filepath.Join(a.dir, "runs"))
	told := fetchesOfGood.FindStringSubmatch(page)
	if len(runs) > n+1 || told == nil || told[1] != strconv.Itoa(len(runs)) {
		return fmt.Errorf("%d runs for %d scrapes, told %q", len(runs), n+1, told)
	}
	return nil
}

// withTLS are flags for a certificate.
func withTLS(a *arena) []string {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), nil)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	secret, err2 := x509.MarshalPKCS8PrivateKey(key)
	a.fault = errors.Join(a.fault, err, err2)
	a.tls = &tls.Config{InsecureSkipVerify: true}
	file := a.file("cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))+
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})))
	return []string{"--web.tls-cert-file", file, "--web.tls-key-file", file}
}

// manyCommands are 30 commands whose output does not end in a newline.
func manyCommands(a *arena) []string {
	flags := good(a)
	for i := range 30 {
		flags = append(flags, "--exec", fmt.Sprintf("b%d=printf 'a 1'", i))
	}
	return flags
}

// allAreUp checks that all commands are up.
func allAreUp(a *arena, n int, page string) error {
	for i := range 30 {
		if name := fmt.Sprintf("b%d", i); !isUp(page, name) {
			return fmt.Errorf("%s is down", name)
		}
	}
	return nil
}

// flippingExporter is an exporter that fails every other time.
func flippingExporter(a *arena) []string {
	var n atomic.Int64
	return append(good(a), "--http", "flips="+a.serve(func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1)%2 == 0 {
			w.WriteHeader(http.StatusInternalServerError)
		}
		io.WriteString(w, "flips 1\n")
	}))
}

// logIsShort checks that the log does not tell of each change.
func logIsShort(a *arena) error {
	text, err := os.ReadFile(a.log.Name())
	if n := strings.Count(string(text), "source is "); n > 10 {
		err = fmt.Errorf("%d changes are logged", n)
	}
	return err
}

// hangingToken is an exporter whose token is on a disk that will hang.
func hangingToken(a *arena) []string {
	url := a.serve(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "good 1\n") })
	return []string{"--http", "good=" + url, "--bearer-token-file", "good:" + filepath.Join(a.mount(), "token")}
}

// hangChanged has the disk hang after a file on it has changed.
func hangChanged(a *arena, n int) {
	if n == 1 {
		a.disk.hang(true)
		a.disk.changed.Store(true)
		a.program.Process.Signal(syscall.SIGHUP)
	}
}

// endsThough checks that SIGTERM ends the program while the disk hangs. What is left then is a zombie that
// waits for the disk.
func endsThough(a *arena) error {
	a.program.Process.Signal(syscall.SIGTERM)
	for range 60 {
		time.Sleep(100 * time.Millisecond)
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.program.Process.Pid))
		if strings.Contains(string(stat), ") Z ") {
			return nil
		}
	}
	return errors.New("SIGTERM does not end the program")
}

// body returns an exposition of about size bytes, with families of a hundred samples.
func body(name, metricType string, size int) string {
	var b strings.Builder
	for i := 0; b.Len() < size; i++ {
		if i%100 == 0 {
			fmt.Fprintf(&b, "# HELP "+name+" What is measured.\n# TYPE "+name+" %s\n", i/100, i/100, metricType)
		}
		fmt.Fprintf(&b, name+"{i=\"%d\",of=\"everything that is measured\"} 1\n", i/100, i)
	}
	return b.String()
}

// invented returns a value that nobody used before.
func invented() string { return strconv.FormatUint(rand.Uint64(), 36) }

// subset returns a query for some of ten sources.
func subset() string {
	query := "exporter_name=good"
	for i := range 10 {
		if rand.IntN(2) == 0 {
			query += fmt.Sprintf("&exporter_name=s%d", i)
		}
	}
	return query
}

// zipped asks for gzip half of the time.
func zipped(r *http.Request) {
	if rand.IntN(2) == 0 {
		r.Header.Set("Accept-Encoding", "gzip")
	}
}

// ---- Running

func main() {
	if len(os.Args) > 2 && os.Args[1] == "-helper" {
		help(os.Args[2:])
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if !run(ctx) {
		os.Exit(1)
	}
}

// run runs the scenarios that the flags choose. It reports whether all held.
func run(ctx context.Context) bool {
	only := flag.String("run", "", "comma-separated scenarios (all)")
	binary := flag.String("binary", "", "the program, if it is built already")
	addresses := flag.Int("addresses", 0, "client addresses of the attackers, at most 60000 (as in the table)")
	flag.Parse()
	temp, err := os.MkdirTemp("", "attack")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return false
	}
	defer os.RemoveAll(temp)
	if *binary == "" {
		*binary = filepath.Join(temp, "reverse_exporter")
		if out, err := exec.Command("go", "build", "-o", *binary, "reverse_exporter").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "failed to build the program: %v\n%s", err, out)
			return false
		}
	}
	const row = "%-4s %-41s %9v %9v %7v  %-8v %8v %6v  %s\n"
	fmt.Printf(row, "", "scenario", "attackers", "addresses", "attacks", "served", "slowest", "peak", "")
	held := true
	for _, s := range scenarios {
		named := slices.Contains(strings.Split(*only, ","), s.id)
		if ctx.Err() != nil || !named && (*only != "" || s.honest != nil) {
			continue
		}
		if *addresses > 0 {
			s.addresses = min(*addresses, s.attackers)
		}
		o := s.run(ctx, *binary, filepath.Join(temp, s.id))
		fmt.Printf(row, s.id, s.name, s.attackers, s.addresses, o.attacks, fmt.Sprintf("%d of %d", o.served, o.asked),
			fmt.Sprintf("%.1f s", o.slowest.Seconds()), fmt.Sprintf("%d MB", o.peak), o.verdict)
		held = held && o.held
	}
	return held && ctx.Err() == nil
}

// outcome is what became of a scenario.
type outcome struct {
	attacks int64
	served  int
	asked   int           // honest scrapes
	slowest time.Duration // answer to the honest scraper
	peak    int           // memory, in MB
	held    bool
	verdict string
}

// run runs a scenario to its end.
func (s *scenario) run(ctx context.Context, binary, dir string) (o outcome) {
	ctx, stop := context.WithCancel(ctx)
	a := &arena{ctx: ctx, dir: dir, binary: binary}
	defer a.close()
	var attackers sync.WaitGroup
	defer attackers.Wait()
	defer stop()
	switch err := a.start(s); {
	case err != nil:
		return outcome{verdict: "FAILED to start: " + err.Error()}
	case a.skip != "":
		return outcome{held: true, verdict: "skipped: " + a.skip}
	}
	turns := a.turns(ctx, s)
	for i := range s.attackers {
		c := newClient(a, 1+i%s.addresses)
		attackers.Go(func() {
			for range turns {
				a.attacks.Add(1)
				s.attack(ctx, a, c)
			}
			c.http.CloseIdleConnections()
		})
	}
	sleep(ctx, time.Second) // until all are there
	read := s.scrapeAll
	if s.honest != nil {
		read = s.honest
	}
	o, faults := read(ctx, a)
	o.peak, o.attacks = a.peak(), a.attacks.Load()
	faults = append(faults, a.fault)
	if s.after != nil {
		faults = append(faults, s.after(a))
	}
	switch {
	case o.peak == 0:
		faults = append(faults, errors.New("the program has ended"))
	case o.peak > s.memory:
		faults = append(faults, fmt.Errorf("more than %d MB", s.memory))
	}
	if err := errors.Join(faults...); err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		o.verdict = "FAILED: " + first
		return o
	}
	o.held, o.verdict = true, "held"
	return o
}

// scrapeAll makes the honest scrapes and returns what is wrong with them.
func (s *scenario) scrapeAll(ctx context.Context, a *arena) (o outcome, faults []error) {
	var mu sync.Mutex // guards o and faults
	var all sync.WaitGroup
	honest := newClient(a, 0)
	o.asked = scrapes
	for n := range scrapes {
		if s.before != nil {
			s.before(a, n)
		}
		all.Go(func() {
			began := time.Now()
			page, err := honest.scrape(ctx, "/metrics", "")
			took := time.Since(began)
			switch {
			case err == nil && !isUp(page, "good"):
				err = errors.New("the source is down")
			case err == nil && s.check != nil:
				err = s.check(a, n, page)
			}
			mu.Lock()
			defer mu.Unlock()
			o.slowest = max(o.slowest, took)
			if err == nil {
				o.served++
			} else {
				faults = append(faults, fmt.Errorf("scrape %d: %w", n+1, err))
			}
		})
		sleep(ctx, interval)
	}
	all.Wait()
	return o, faults
}

// arena is where a scenario takes place.
type arena struct {
	ctx       context.Context // until the end of the scenario
	dir       string
	self      string // this program
	binary    string
	skip      string // why the scenario cannot be run here
	fault     error  // of what the scenario itself does
	addr      string // of the program
	program   *exec.Cmd
	log       *os.File // that the program gets
	logReader *os.File // nil without a pipe
	servers   []*http.Server
	disk      disk
	integrity *integrity
	login     bool        // those who attack know the password
	tls       *tls.Config // of clients, if the program has TLS
	ordinary  bool        // the program is not run as root
	pace      int         // bytes that the honest scraper reads in a second, 0 for all there are
	attacks   atomic.Int64
}

// start starts the program and waits until it answers.
func (a *arena) start(s *scenario) (err error) {
	if err := os.Mkdir(a.dir, 0o700); err != nil {
		return err
	}
	if a.log, err = os.Create(filepath.Join(a.dir, "log")); err != nil {
		return err
	}
	if a.self, err = os.Executable(); err != nil {
		return err
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	a.addr = free.Addr().String()
	args := append(s.flags(a), "--web.listen-address", a.addr)
	free.Close()
	if a.skip != "" || a.fault != nil {
		return a.fault
	}
	a.program = exec.Command(a.binary, args...)
	a.program.Stderr = a.log
	a.program.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a.ordinary && os.Getuid() == 0 {
		a.program.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
	}
	if err := a.program.Start(); err != nil {
		return err
	}
	for range 100 {
		if conn, err := net.Dial("tcp", a.addr); err == nil {
			return conn.Close()
		}
		time.Sleep(50 * time.Millisecond)
	}
	return errors.New("the program does not answer")
}

// close ends all that the scenario started.
func (a *arena) close() {
	a.disk.hang(false)
	if a.program != nil && a.program.Process != nil {
		a.program.Process.Signal(syscall.SIGTERM)
		killing := time.AfterFunc(8*time.Second, func() { a.program.Process.Kill() })
		a.program.Wait()
		killing.Stop()
	}
	a.disk.unmount()
	for _, s := range a.servers {
		s.Close()
	}
	a.log.Close()
	a.logReader.Close()
	os.RemoveAll(a.dir)
}

// mount mounts the disk and returns its folder.
func (a *arena) mount() string {
	folder, err := a.disk.mount(filepath.Join(a.dir, "disk"))
	if err != nil {
		a.skip = fmt.Sprintf("a FUSE file system is needed, and root: %v", err)
	}
	return folder
}

// sleep waits, unless ctx is done before.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// turns hands out what may be done to the program: a turn for each attacker at once, then
// the rate of the scenario.
func (a *arena) turns(ctx context.Context, s *scenario) <-chan struct{} {
	turns := make(chan struct{})
	go func() {
		defer close(turns)
		for n := 0; ctx.Err() == nil; n++ {
			if n >= s.attackers {
				sleep(ctx, time.Duration(float64(time.Second)/max(s.rate, 1)))
			}
			select {
			case turns <- struct{}{}:
			case <-ctx.Done():
			}
		}
	}()
	return turns
}

// file writes a file and returns its name.
func (a *arena) file(name, text string) string {
	name = filepath.Join(a.dir, name)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		a.fault = err
	}
	return name
}

// serve starts an exporter and returns its URL.
func (a *arena) serve(h http.HandlerFunc) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		a.fault = err
		return ""
	}
	server := &http.Server{Handler: h}
	a.servers = append(a.servers, server)
	go server.Serve(l)
	return "http://" + l.Addr().String() + "/metrics"
}

// password is the one that the program demands in some scenarios.
const password = "right"

// rotate gives the password a new hash, so that the program does not know it yet.
func (a *arena) rotate() {
	hashing := exec.Command(a.binary, "--hash-password")
	hashing.Stdin = strings.NewReader(password)
	hash, err := hashing.Output()
	if err != nil {
		a.fault = err
	}
	name := a.file("users.new", "prometheus:"+string(hash))
	os.Rename(name, filepath.Join(a.dir, "users"))
}

// isUp reports whether a page says that a source is up.
func isUp(page, name string) bool {
	return strings.Contains(page, "\nreverse_exporter_source_up{exporter_name=\""+name+"\"} 1\n")
}

// peak returns the most memory that the program has taken, in MB.
func (a *arena) peak() int { return a.memory("VmHWM") }

// memory returns what the system tells of the memory of the program under a name, in MB, 0 if it has ended.
func (a *arena) memory(name string) int {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.program.Process.Pid))
	_, rest, _ := strings.Cut(string(status), name+":")
	kilobytes, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, _ := strconv.Atoi(kilobytes)
	return n >> 10
}

// cpu returns how much CPU time the program and its commands have taken.
func (a *arena) cpu() (spent time.Duration) {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.program.Process.Pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	if fields := strings.Fields(rest); len(fields) > 15 {
		for _, ticks := range fields[11:15] { // of a hundredth of a second
			n, _ := strconv.Atoi(ticks)
			spent += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return spent
}

// help is what this program does as a command that a scenario runs.
func help(args []string) {
	switch args[0] {
	case "join": // the parent's process group
		group, _ := syscall.Getpgid(os.Getppid())
		syscall.Setpgid(0, group)
		pids, _ := os.OpenFile(args[1], os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		fmt.Fprintln(pids, os.Getpid())
		time.Sleep(time.Minute)
	case "leave": // half a line to a child in a session of its own
		self, _ := os.Executable()
		child := exec.Command(self, "-helper", "late")
		child.Stdout = os.Stdout
		child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		child.Start()
		fmt.Print("balance 1")
	case "late":
		time.Sleep(time.Second)
		fmt.Println("2345")
	}
}

// ---- Clients

// client is one who asks the program, from an address of loopback.
type client struct {
	arena  *arena
	dialer net.Dialer
	http   http.Client
	number int
}

// newClient returns a client with the address of that number. That of the honest one is 0.
func newClient(a *arena, number int) *client {
	address := net.IPv4(127, 0, byte(number/250), byte(1+number%250))
	c := &client{arena: a, number: number, dialer: net.Dialer{LocalAddr: &net.TCPAddr{IP: address}}}
	if a.pace > 0 && number == 0 {
		c.narrow(64<<10, 1460)
	}
	c.http.Transport = &http.Transport{DialContext: c.dialer.DialContext, DisableCompression: number > 0 || a.pace > 0,
		TLSClientConfig: a.tls, DisableKeepAlives: a.tls != nil} // so that each scrape has its handshake
	return c
}

// narrow has the connections of a client take little at a time, as a network does. Otherwise the
// system takes megabytes from the program at once.
func (c *client) narrow(buffer, segment int) {
	c.dialer.Control = func(_, _ string, conn syscall.RawConn) error {
		return conn.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, buffer)
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, segment)
		})
	}
}

// request returns a request for a path.
func (c *client) request(ctx context.Context, path string) (*http.Request, error) {
	scheme := "http://"
	if c.arena.tls != nil {
		scheme = "https://"
	}
	return http.NewRequestWithContext(ctx, "GET", scheme+c.arena.addr+path, nil)
}

// scrape asks as Prometheus does, and returns the page.
func (c *client) scrape(ctx context.Context, path, accept string) (page string, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.request(ctx, path)
	if err != nil {
		return "", err
	}
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	r.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", fmt.Sprint(timeout.Seconds()))
	r.SetBasicAuth("prometheus", password)
	resp, err := c.http.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the answer is %s", resp.Status)
	}
	var text strings.Builder
	for err == nil {
		if _, err = io.CopyN(&text, resp.Body, 64<<10); c.arena.pace > 0 {
			sleep(ctx, time.Second*(64<<10)/time.Duration(c.arena.pace))
		}
	}
	if err == io.EOF {
		err = nil
	}
	return text.String(), err
}

// ask asks for a path, reads the answer and returns its status; change, if there is one, changes the request.
func (c *client) ask(ctx context.Context, path string, change func(r *http.Request)) (status int) {
	r, err := c.request(ctx, path)
	if err != nil {
		return 0
	}
	if c.arena.login {
		r.SetBasicAuth("prometheus", password)
	}
	if change != nil {
		change(r)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

// askOrLeave asks for a path, or leaves as soon as it has.
func (c *client) askOrLeave(ctx context.Context, path string) {
	if c.number%2 == 0 {
		c.ask(ctx, path, nil)
	} else if conn, err := c.send(ctx, path); err == nil {
		conn.Close()
	}
}

// hold asks for a path, and keeps the connection for as long as the program does.
func (c *client) hold(ctx context.Context, path string) {
	if conn, err := c.send(ctx, path); err == nil {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		io.Copy(io.Discard, conn)
		stop()
		conn.Close()
	}
}

// stare asks for a path and reads nothing of the answer.
func (c *client) stare(ctx context.Context, path string) {
	slow := *c
	slow.narrow(4<<10, 536)
	if conn, err := slow.send(ctx, path); err == nil {
		sleep(ctx, 10*time.Second)
		conn.Close()
	}
}

// readSlowly asks for a path and reads a little of the answer ten times a second.
func (c *client) readSlowly(ctx context.Context, path string) {
	slow := *c
	slow.narrow(4<<10, 536)
	conn, err := slow.send(ctx, path)
	if err != nil {
		return
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	for err == nil && ctx.Err() == nil {
		_, err = io.CopyN(io.Discard, conn, 4<<10)
		sleep(ctx, 100*time.Millisecond)
	}
}

// send asks for a path in one packet.
func (c *client) send(ctx context.Context, path string) (net.Conn, error) {
	conn, err := c.dialer.DialContext(ctx, "tcp", c.arena.addr)
	if err == nil && c.arena.tls != nil {
		conn = tls.Client(conn, c.arena.tls)
	}
	if err == nil {
		login := ""
		if c.arena.login {
			login = "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("prometheus:"+password)) + "\r\n"
		}
		_, err = io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\n"+login+"\r\n")
	}
	return conn, err
}
