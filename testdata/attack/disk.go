//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// disk is a FUSE file system of a few files, spoken to without a library. While it hangs, reads
// of some get no answer, and not even SIGKILL ends a process that reads it.
type disk struct {
	folder string // "" if it is not mounted
	fd     int    // of /dev/fuse

	changed atomic.Bool // the files have another time than before

	mu      sync.Mutex // guards both below
	hanging bool
	unread  []unread // reads that are still to be answered
}

// unread is a read that is to be answered.
type unread struct{ id, node uint64 }

// diskFile is one of the files of a disk.
type diskFile struct{ name, text string }

// files are those of a disk, by node number. The folder has 1, and all but well.prom hang.
var files = []diskFile{2: {"hung.prom", "hung 1\n"}, 3: {"well.prom", "well 1\n"}, 4: {"token", "token\n"}}

// mount mounts the disk and returns its folder.
func (d *disk) mount(folder string) (string, error) {
	os.Mkdir(folder, 0o700)
	fd, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return folder, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d", fd, os.Getuid(), os.Getgid())
	if err := syscall.Mount("attack", folder, "fuse", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		syscall.Close(fd)
		return folder, err
	}
	d.folder, d.fd = folder, fd
	go d.answerAll()
	return folder, nil
}

// unmount unmounts the disk, which fails what still waits for it.
func (d *disk) unmount() {
	if d.folder != "" {
		syscall.Unmount(d.folder, syscall.MNT_FORCE|syscall.MNT_DETACH)
	}
}

// hang has the disk hang or, at its end, answers all reads.
func (d *disk) hang(so bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hanging = so; !so {
		for _, r := range d.unread {
			d.reply(r.id, 0, files[r.node].text)
		}
		d.unread = nil
	}
}

// answerAll answers the kernel until the disk is unmounted.
func (d *disk) answerAll() {
	defer syscall.Close(d.fd)
	request := make([]byte, 1<<17)
	for {
		n, err := syscall.Read(d.fd, request)
		switch {
		case err == syscall.EINTR || err == syscall.ENOENT: // the request was taken back
		case err != nil:
			return
		default:
			d.answer(request[:n])
		}
	}
}

// answer answers a request: see include/uapi/linux/fuse.h.
func (d *disk) answer(request []byte) {
	u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	id, node, rest := u64(request[8:]), u64(request[16:]), request[40:]
	switch u32(request[4:]) { // a number of each kind of request
	case 26: // INIT: version 7.31, largest read and write
		d.reply(id, 0, [16]uint32{7, 31, 1 << 16, 0, 0, 1 << 16, 1})
	case 1: // LOOKUP
		at := slices.IndexFunc(files, func(f diskFile) bool { return f.name+"\x00" == string(rest) })
		if at < 0 {
			d.reply(id, syscall.ENOENT, nil)
			return
		}
		d.reply(id, 0, struct {
			node, generation uint64
			validity         [6]uint32
			attributes
		}{node: uint64(at), attributes: d.attributesOf(uint64(at))})
	case 3: // GETATTR
		d.reply(id, 0, struct {
			validity [4]uint32
			attributes
		}{attributes: d.attributesOf(node)})
	case 14, 27: // OPEN and OPENDIR: without a cache
		d.reply(id, 0, [4]uint32{2: 1})
	case 28: // READDIR
		var entries []byte
		for i := 2; i < len(files) && u64(rest[8:]) == 0; i++ {
			entries = binary.NativeEndian.AppendUint64(entries, uint64(i))
			entries = binary.NativeEndian.AppendUint64(entries, uint64(i))
			entries = binary.NativeEndian.AppendUint32(entries, uint32(len(files[i].name)))
			entries = binary.NativeEndian.AppendUint32(entries, syscall.DT_REG)
			entries = append(entries, files[i].name...)
			entries = append(entries, make([]byte, -len(entries)&7)...)
		}
		d.reply(id, 0, entries)
	case 15: // READ
		d.read(id, node, u64(rest[8:]))
	case 18, 29: // RELEASE and RELEASEDIR
		d.reply(id, 0, nil)
	case 2, 36, 42: // FORGET, INTERRUPT and BATCH_FORGET want no answer
	default:
		d.reply(id, syscall.ENOSYS, nil)
	}
}

// attributes are struct fuse_attr.
type attributes struct {
	node, size, blocks uint64
	times              [3]uint64
	nanoseconds        [3]uint32
	mode, links        uint32
	others             [5]uint32
}

// attributesOf returns those of a node.
func (d *disk) attributesOf(node uint64) attributes {
	if node == 1 {
		return attributes{node: node, mode: syscall.S_IFDIR | 0o700, links: 2}
	}
	is := attributes{node: node, mode: syscall.S_IFREG | 0o600, links: 1, size: uint64(len(files[node].text))}
	if d.changed.Load() {
		is.times[1] = 1
	}
	return is
}

// read answers a READ, unless the disk hangs.
func (d *disk) read(id, node, offset uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	text := files[node].text
	if node != 3 && d.hanging {
		d.unread = append(d.unread, unread{id, node})
		return
	}
	d.reply(id, 0, text[min(offset, uint64(len(text))):])
}

// reply sends an answer.
func (d *disk) reply(id uint64, errno syscall.Errno, data any) {
	var body []byte
	switch data := data.(type) {
	case nil:
	case string:
		body = []byte(data)
	default:
		body, _ = binary.Append(nil, binary.NativeEndian, data)
	}
	answer := binary.NativeEndian.AppendUint32(nil, uint32(16+len(body)))
	answer = binary.NativeEndian.AppendUint32(answer, uint32(-int32(errno)))
	answer = binary.NativeEndian.AppendUint64(answer, id)
	syscall.Write(d.fd, append(answer, body...))
}
