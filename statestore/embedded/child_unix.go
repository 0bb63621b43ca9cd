//go:build unix && !linux

package embedded

import "syscall"

// childAttributes put the child in a process group of its own, so that a
// Ctrl-C meant for the parent does not stop etcd before its clients. Only Linux
// can end it together with a parent that is killed: elsewhere the next start
// finds the directory in use and names the process.
func childAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
