//go:build !linux

package proxy

import "syscall"

// processAttributes make a child that leads a process group of its own. Only
// Linux ends it with us when we are killed.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
